"""What a corpus is made from: files of every kind, and the documents in them."""
