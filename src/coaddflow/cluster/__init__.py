"""Queue systems: submitting to Slurm and PBS, and what became of the jobs."""
