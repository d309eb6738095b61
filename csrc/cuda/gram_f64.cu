#include "gram_call.cuh"

template std::int64_t liar::cuda::gram_update_of<double>(const GramCall&, void*, Place);
