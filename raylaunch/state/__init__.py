"""What lies on shared storage: how files are written, the records of clusters and runs, requests. The two loops meet here."""
