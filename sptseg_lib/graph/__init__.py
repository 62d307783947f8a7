"""Deep Spectral Methods: an image as a graph of patches, cut by the eigenvectors of its Laplacian.

    features    keys, queries, values or tokens of a ViT block          objects   Fiedler masks, boxes, CorLoc
    affinity    which patches belong together: features and colour      regions   several segments an image
    operators   affinities as products: dense, sparse or never stored   clusters  from segments to classes
    eigen       the smallest eigenvectors of the Laplacian              selftrain a network on pseudo labels
    crf         masks on the patch grid, refined to pixels              matting   soft segments
    prompt      a spectral prompt whose basis is the image's own graph

Besides the package's shape suffixes: n for graph nodes (patches or pixels) is N, k counts eigenvectors,
S the segments of an image. Eigenvectors are rows: vectors_BkN. Source: Melas-Kyriazi, Rupprecht, Laina
and Vedaldi, Deep Spectral Methods, CVPR 2022.
"""
