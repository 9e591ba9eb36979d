"""When a curve breaks, offline and while it happens."""
