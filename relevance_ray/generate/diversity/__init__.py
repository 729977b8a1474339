"""How diverse a generated set is, and where it drifts."""
