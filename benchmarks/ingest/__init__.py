"""What does it cost to turn text into a stored, tokenised corpus, beside other tools?"""
