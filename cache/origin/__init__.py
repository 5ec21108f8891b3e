"""Object stores, where the bytes come from: `ports.Origin` is what the cache needs of one, `registry.origin_for` finds one."""
