"""Every message between workers, shards, standbys and the supervisor, and its bytes. Pure."""
