"""What a run was like, from its journal: pure functions over entries (`record`, `goodput`, `text`, `page`), and what shows them."""
