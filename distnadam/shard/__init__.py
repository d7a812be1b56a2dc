"""The state machine of one shard: messages in, effects out. Pure."""
