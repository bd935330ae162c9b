"""Several runs at once over one base: grids of settings, trained together, with a table of what came of them."""
