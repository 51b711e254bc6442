"""From a request to a plan, and from results to a packed model: what all drivers and callbacks share."""
