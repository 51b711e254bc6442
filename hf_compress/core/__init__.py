"""Which weights, and what happens to them: rules, plan, schemes, registry, errors, configuration base."""
