"""What the scripts have in common: options, tables, plots, and a description of the environment."""
