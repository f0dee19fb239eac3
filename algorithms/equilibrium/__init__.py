"""Activities settle first, then weights follow them."""
