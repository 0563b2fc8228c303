"""Arrays in, arrays out: attention, rotary embedding, top-k, layer loops. No parameters live here."""
