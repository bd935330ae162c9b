"""The questions of three papers as experiments: grids of runs, their tables, figures and conclusions."""
