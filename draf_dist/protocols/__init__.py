"""Who may write what, and in which order: what several processes agree on over a store, as generators of store operations."""
