"""What the commands show, as rich tables; nothing here prints."""
