"""Stand-ins for hardware that test machines do not have."""
