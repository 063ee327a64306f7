"""What tests share: small records, models, texts and servers."""
