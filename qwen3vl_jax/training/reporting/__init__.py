"""What a run tells: logs, metrics, FLOPs, memory estimates, the dry run."""
