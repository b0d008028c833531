"""What the cluster's commands mean and when its voters change; pure. Start at `commands`."""
