"""What a pair gains over its branches alone, and how sure that is."""
