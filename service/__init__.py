"""The worker and its API. A record's way, in order: records, grid, waves, arena, engine, transport, worker, api."""
