"""Feature extractors, and the statistics that compare samples with real images on them."""
