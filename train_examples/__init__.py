"""Training scripts on real data, one readable file per idea. They run under torchrun, under the launcher, and alone."""
