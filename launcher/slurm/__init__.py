"""Jobs: submission, the batch script and its supervisor, requeueing, the state of a job."""
