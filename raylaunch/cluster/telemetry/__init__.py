"""What the nodes are busy with: measured by their agents, collected by the head."""
