"""Where a job runs: local servers, clusters."""
