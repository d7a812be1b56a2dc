"""The page on one or several runs: what they recorded, as one HTML file that needs no network."""
