"""Settings of the weights that the paper's authors published; their checkpoint does not hold them."""

PUBLISHED = ("--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=1", "--num_query=15")
