"""Search campaigns: hyper-parameters of a job, sought with Ray Tune, Optuna and successive halving."""
