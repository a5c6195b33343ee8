"""Rule report."""
