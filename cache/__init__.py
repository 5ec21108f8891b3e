"""Railhead's cache: object-store shards on node-local disk, ahead of the order in which training reads them."""
