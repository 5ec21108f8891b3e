"""The order of the data: seed, epoch and step decide which samples form a batch, and so which blocks are needed when. Pure."""
