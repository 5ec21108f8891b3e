"""What lies in a shard: tar archives, raw files, token shards. Bytes in, arrays of where each sample lies out."""
