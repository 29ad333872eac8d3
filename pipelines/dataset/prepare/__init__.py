"""One reader per published annotation format, each turning it into manifest rows."""
