"""The page of a report: one HTML file that holds its style, its script and its data, and asks no host for anything."""
