"""The middleware of dramatiq_policies, one per module; `ordering` puts them in order on a broker."""
