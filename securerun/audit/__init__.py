"""What on a host is more open than the permission table allows: finding it, and taking the bits away."""
