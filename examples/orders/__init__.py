"""A shop's background jobs: an order confirmation by e-mail, an import in batches, a nightly report."""
