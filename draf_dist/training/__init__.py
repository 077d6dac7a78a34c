"""Loop, engines, checkpoints, run folder."""
