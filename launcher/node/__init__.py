"""What runs on one node: the agent, the guardian of each process, the runner of a rank, the host of the attempt's store."""
