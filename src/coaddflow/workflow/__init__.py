"""What Snakemake sees: the plan, what it costs, how it goes."""
