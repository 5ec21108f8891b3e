"""Which blocks are on this node's disk, which shall be next, and whom they displace. Decides only: no I/O, no clock."""
