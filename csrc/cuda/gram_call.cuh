// One dtype's half of gram_update_; each is compiled in a file of its own.
#pragma once

#include "kernels/gram.cuh"
#include "place.cuh"

namespace liar::cuda {

template <class T>
std::int64_t gram_update_of(const GramCall& call, void* workspace, Place place) {
  Stream stream = open_stream("gram_update_", place);
  const std::int64_t bytes = gram_update<T>(call, workspace, stream);
  require("gram_update_", stream.error);
  return bytes;
}

}  // namespace liar::cuda
