"""Matrix products with adapters beside them, and what these need."""
