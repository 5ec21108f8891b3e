"""The fabric room: what one node's GPUs, NICs and limits are, and what follows from them for a gang.

Facts are read once per node (`probe`, the only I/O of the decision path) and are plain data. Everything else is a function
of the facts of all nodes: distances (`topology`), the HCAs to use (`hcas`), the environment of every rank with a reason for
each value (`rules`), what is wrong (`findings`), the order of the nodes (`order`). `preflight` and `reach` measure the
network between nodes. The room imports nothing else of the launcher, and knows neither Ray nor Kubernetes: how the facts of
the other nodes arrive here is the caller's business.
"""
