"""How the network was trained that the paper's authors published."""

# A checkpoint does not say so itself.
PUBLISHED = ("--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=1", "--num_query=15")
