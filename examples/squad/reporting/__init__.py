"""Code that the scripts share: options, tables, plots, and a description of the environment."""
