"""The main job: which tensors become int8, and turning them into it, shard by shard."""
