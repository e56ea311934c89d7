"""Feature extractors, and statistics that compare samples with real images by their features."""
